"""The SageMaker SDK v2 as its users write it: Estimator, an endpoint, a batch transform.

A program of its own, since the SDK v2 excludes the v3 of the tests (see `make check-sdk2`). On its
command line stand the address of the image, role, bucket and a file; AWS_ENDPOINT_URL has the
account. The file is written as JSON: the job, and what the endpoint replied.
"""

import json
import sys
from pathlib import Path

import sagemaker
from sagemaker.deserializers import JSONDeserializer
from sagemaker.estimator import Estimator
from sagemaker.serializers import JSONSerializer

image, role, bucket, out = sys.argv[1:]
session = sagemaker.Session(default_bucket=bucket)
estimator = Estimator(
    image_uri=image,
    role=role,
    instance_count=1,
    instance_type="ml.m5.xlarge",
    output_path=f"s3://{bucket}/models/",
    base_job_name="sdk2",
    sagemaker_session=session,
    hyperparameters={
        "size": "tiny",
        "tokenizer_kind": "word",
        "image_size": 32,
        "batch_size": 8,
        "max_steps": 4,
        "num_validations": 1,
        "caption_dropout": 0.1,
    },
)
pictures = f"s3://{bucket}/data/pictures"
estimator.fit({"train": f"{pictures}/train/", "validation": f"{pictures}/validation/"})
predictor = estimator.deploy(
    initial_instance_count=1,
    instance_type="ml.m5.xlarge",
    serializer=JSONSerializer(),
    deserializer=JSONDeserializer(),
)
reply = predictor.predict({"caption": "red circle", "num_candidates": 1, "seed": 7})
transformer = estimator.transformer(
    instance_count=1,
    instance_type="ml.m5.xlarge",
    strategy="MultiRecord",
    assemble_with="Line",
    accept="application/jsonlines",
    output_path=f"s3://{bucket}/replies/",
)
transformer.transform(
    f"s3://{bucket}/captions/requests.jsonl",
    content_type="application/jsonlines",
    split_type="Line",
)
predictor.delete_model()
predictor.delete_endpoint()
job = estimator.latest_training_job.name
Path(out).write_text(json.dumps({"job": job, "reply": reply}))
