"""
Who we are to others: the auth tree's authorities and leaves, verified before use and renewed in time.
"""
