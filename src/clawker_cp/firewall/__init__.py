"""
Rules, their compilation into one plan, and what carries the plan out (contract sections 7 and 8).

Holds no sockets of agents and no kernel calls: those are behind Protocols that the composition
root fills in.
"""
