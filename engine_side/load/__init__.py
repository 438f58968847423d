"""Loading: copy a sealed version from the local arena into live parameters."""
