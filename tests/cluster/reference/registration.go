// Registration of the reference driver's node with the kubelet, so that it needs no sidecar for it. No product, see
// main.go.
package main

import (
	"context"
	"log"

	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// registrar answers the kubelet, which calls when it sees a socket in its directory of plugins.
type registrar struct {
	registration.UnimplementedRegistrationServer
	endpoint string
}

func newRegistrar(endpoint string) *grpc.Server {
	server := grpc.NewServer()
	registration.RegisterRegistrationServer(server, &registrar{endpoint: endpoint})
	return server
}

func (r *registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{Type: registration.CSIPlugin, Name: driverName, Endpoint: r.endpoint, SupportedVersions: []string{"1.0.0"}}, nil
}

func (r *registrar) NotifyRegistrationStatus(_ context.Context, said *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if !said.PluginRegistered {
		log.Fatalf("the kubelet refuses the registration: %s", said.Error) // a new start is a new attempt
	}
	log.Print("registered with the kubelet")
	return &registration.RegistrationStatusResponse{}, nil
}
