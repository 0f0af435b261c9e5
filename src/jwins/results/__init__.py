"""What runs measured, as numbers: records, groups of seeds, intervals."""
