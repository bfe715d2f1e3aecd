"""What a model of transformers has to do with its files on the hub: configuration, names, layers, ties."""
