"""The exit codes with which a process of a part says why it ended early."""

FRESH_PROCESS = 3  # its GPU is in no state to go on
TOO_LONG = 4  # a check took longer than its limit
