"""Equivalence checks: is the output the same, and if not, why?"""
