"""
Agents: who they are and how their lives go. Decides no policy and starts no process itself.
"""
