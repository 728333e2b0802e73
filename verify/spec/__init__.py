"""What is computed, on which values: problems, masks, input distributions, layouts, cases,
arithmetics.
"""
