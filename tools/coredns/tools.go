//go:build tools

// Package tools pins the DNS server of the tests' one-node cluster.
package tools

import _ "github.com/coredns/coredns"
