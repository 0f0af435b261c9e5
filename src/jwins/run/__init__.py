"""Run experiments in run folders."""
