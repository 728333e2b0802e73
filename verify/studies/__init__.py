"""Experiments about this project itself: what it catches, what it costs, whether its bounds
hold.
"""
