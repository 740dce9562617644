"""A server that scores over HTTP, and the comparison of other servers with our scores."""
