"""Who may do what: users, roles, limits, and the form of refusals."""
