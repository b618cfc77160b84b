"""
`python -m clawker_cp` is `clawker-cp`.
"""

from clawker_cp.cli.main import main

main()
