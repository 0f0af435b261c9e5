"""Workloads: data, models, losses and metrics."""
