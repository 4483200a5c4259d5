"""The rules: what a declared objective must satisfy, one function each."""

RULES = ()
