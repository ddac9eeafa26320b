//go:build tools

// Package tools pins the helm program that checks and installs the chart.
package tools

import _ "helm.sh/helm/v4/cmd/helm"
