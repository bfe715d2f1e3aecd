"""Models that another tool has quantized: one file for each tool, which knows that tool and nothing else."""
