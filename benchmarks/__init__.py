"""Measurements of speed and size. Nothing here is a test: numbers belong to the machine they were taken on."""
