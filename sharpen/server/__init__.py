"""The scorer over HTTP: requests in, micro-batches of one scorer, answers out.

    bytes -> `bodies` -> one of the `routes` with its pydantic model -> jobs
          -> `batcher` (one thread, one scorer) -> the answer of the route -> `bodies` -> bytes

`app` takes a request along this way, and alone knows FastAPI, Starlette and uvicorn. `batcher`,
`state`, `text` and `unscorable` need nothing that `sharpen[serve]` brings: integrations use
them inside a trainer.
"""
