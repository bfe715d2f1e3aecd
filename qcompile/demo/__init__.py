"""What the demo is made of: a model, its training on real images, and what is measured of each form of it."""
