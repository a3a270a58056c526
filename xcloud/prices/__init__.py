"""What machines, traffic and storage cost: dated list prices, and a user's own over them.

`data/` holds a file for each cloud, transcribed by hand from the public price pages that it names; nothing is fetched.
`book` reads them, lays a user's file over them and looks prices up. No torch, no Ray.
"""

from xcloud.prices.book import Instance, Market, Place, Price, PriceBook, load_prices

__all__ = ["Instance", "Market", "Place", "Price", "PriceBook", "load_prices"]
