"""A server of gs:// or s3:// on loopback, with a bucket named "bucket": python bucket_server.py gs 8000.

Prints a line when it is ready, and ends when its standard input does. The gs emulator overlooks the precondition
ifGenerationMatch of an upload, which Google's store promises and locks and tensorstore rely on: it is added here.
"""

import os
import sys
from http import HTTPStatus


def serve_gs(port: int) -> None:
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import create_server

    def guarded(upload):
        def checked(request, response, storage):
            wanted = request.query.get("ifGenerationMatch")
            meta = request.data.get("meta", {}) if isinstance(request.data, dict) else {}
            name = request.query["name"][0] if "name" in request.query else meta["name"]
            try:
                now = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
            except objects.NotFound:
                now = "0"
            if wanted and wanted[0] != now:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return None
            return upload(request, response, storage)

        return checked

    for name in ("_media_upload", "_multipart_upload"):
        setattr(objects, name, guarded(getattr(objects, name)))
    create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").start()


def serve_s3(port: int) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    ThreadedMotoServer("127.0.0.1", port).start()
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket="bucket")


if __name__ == "__main__":
    {"gs": serve_gs, "s3": serve_s3}[sys.argv[1]](int(sys.argv[2]))
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
