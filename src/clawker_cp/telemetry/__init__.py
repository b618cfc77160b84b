"""
The record of every decision: one shape for kernel, gate and proxy, kept in memory and on disk.
"""
