"""
What other processes ask of the control plane, and how it is answered. Decides no policy.
"""
