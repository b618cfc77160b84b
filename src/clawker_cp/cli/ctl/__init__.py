"""
`clawkerctl`: commanding a running control plane. Each module has the verbs of one subject.
"""
