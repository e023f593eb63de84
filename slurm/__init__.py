"""Batch scripts for Slurm; installed as `megalm.slurm`."""
