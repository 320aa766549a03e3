"""The aggregator room: judges contributions, folds them into the weights, measures and publishes the next version."""
