"""The server: the only package that imports monailabel or fastapi.

Every module that has HTTP routes has a function ``build_endpoints() -> Endpoints``; `install.install` puts them before
the host's. Routes reach the app's parts through `parts.get_context`, which the app fills when it starts.
"""
