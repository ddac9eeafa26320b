//go:build tools

// Package tools pins the kubeconform program that checks the chart's objects against their schemas.
package tools

import _ "github.com/yannh/kubeconform/cmd/kubeconform"
