"""The time of products and exchanges that run side by side, in pieces."""


def beside(product: float, collective: float, share: float) -> float:
    """Seconds of both at once, the collective taking a share of the product's speed."""
    return max(collective, product + share * collective) if product else collective


def pieced(product: float, collective: float, count: int, share: float) -> float:
    """Seconds of `count` products and collectives, a product beside the other's next piece."""
    rest = count - 1
    return product + collective + beside(rest * product, rest * collective, share)
