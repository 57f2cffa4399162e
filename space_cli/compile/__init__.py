"""Compiled models: exported and packed for CPUs, captured as CUDA graphs for GPUs.

Writes and reads files, reads the environment (`CXX`, `SPACE_CPU`) and runs a C++ compiler, so that `core` need not.
"""
