"""placeholder"""


async def run_demo(settings: object, options: object) -> None:
    """Not here yet."""
