"""Train, balance and analyse extremely sparse mixtures of experts of the Trinity family.

Two halves and a waist: modules that make a run (torch) write one labelled file through
`record`; modules that read a run (`metrics`, `plots`) never import torch.

One legend names tensor axes in code (`load_LE`) and dimensions in run files (`layer`,
`expert`):

    B batch   S position   T tokens (B*S)     D model width         H heads   V vocabulary
    L layer   E expert     K chosen experts   R routed rows (T*K)   F expert width
    C head width

This package imports nothing by itself: write `from trinity_lib.record import open_run`.
"""
