// Nothing of these modules is built: tools/build takes files out of them. `go mod tidy` would drop them.
module latentflow/tools/definitions

go 1.26.0

require (
	github.com/prometheus-operator/prometheus-operator v0.85.0
	sigs.k8s.io/gateway-api v1.6.3
)
