"""The reference model as a service: in process, over HTTP, in a terminal and on a page."""
