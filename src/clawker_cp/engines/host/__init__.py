"""
The host engine: sandboxes of namespaces, a cgroup and a veth, without any daemon or image.
"""
