"""
Adapters between domain packages: each fulfils one package's Protocol with another's object.

Part of the composition root (`app`); no package below imports it.
"""
