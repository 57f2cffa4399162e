"""SPACE's method in the paper's words: block, collator, choosing, cache, decoder.

Takes tensors and a model object; knows no path, no terminal and no environment variable.

Shape letters, the same in every module: B batch, S sequence, Q slots of a block, L committed length (tokens in the
cache), N = L + Q keys, V vocabulary, H heads, D head dimension; k candidates, m masks per group, G groups.
"""
