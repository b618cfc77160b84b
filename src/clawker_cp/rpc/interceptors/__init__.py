"""
What every call passes before its handler: recovery -> ready gate -> auth -> identity (contract 5).

`rpc.server` puts them in this order; authentication itself is `rpc.auth`.
"""
