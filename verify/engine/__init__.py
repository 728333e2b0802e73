"""The one loop: picks kernels and properties, draws and judges cases, emits events. Imports no
front end.
"""
