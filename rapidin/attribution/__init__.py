"""Attribution: from generations and a cache to the training examples behind them."""
