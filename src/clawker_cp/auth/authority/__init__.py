"""
The embedded token authority: Hydra's endpoints, in this process (contract 3.3 to 3.6).
"""
