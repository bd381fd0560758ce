"""Runs under SLURM: what a job is told, how stages follow each other, and whether an ended job goes on."""
