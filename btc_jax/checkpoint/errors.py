"""What can be wrong with a file."""


class BTCFormatError(ValueError):
    """A file is not a compressed checkpoint that this version can read."""


class BTCIntegrityError(BTCFormatError):
    """A file is a compressed checkpoint, and its content was damaged."""
