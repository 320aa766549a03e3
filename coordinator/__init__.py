"""The coordinator: rounds, leases, the ledger that holds them, and the gateway and keeper that serve them."""
