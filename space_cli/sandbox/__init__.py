"""Runs code that a model wrote, where it can compute and nothing else: Landlock, a seccomp filter and rlimits.

Ours rather than bubblewrap, which filters no system call, limits no memory and needs user namespaces, so that programs
inside it start processes and open sockets, and it does not start in a container or on a kernel that denies namespaces.
"""
