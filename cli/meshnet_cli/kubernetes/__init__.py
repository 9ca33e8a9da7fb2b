"""Manifests of Kubernetes, as values in and values out: what `meshnet inject`, `uninject` and `install` print.

    manifests   text to plain values and back, as kubectl reads it
    wishes      what flags and annotations ask of the sidecar in a pod, validated
    containers  the two containers and their volumes, as they are put into a pod
    shape       the part of a pod's shape that all of this relies on
    probes      a kubelet's probes turned to the sidecar's relay, and back
    pod         one pod: what is put in, what is refused, and how all of it is taken out again
    workloads   where the pods are in the documents of a file
    resources   the ConfigMap and the Secrets that such pods need

Nothing in this room reads a file, a clock or the cluster.
"""
