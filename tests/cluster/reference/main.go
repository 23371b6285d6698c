// The reference CSI driver: what the benchmarks of the test cluster compare ours with. A volume is a sparse raw image
// file in a directory that all nodes share, behind a loop device, with xfs.
//
// It is no product: it has no crash safety. Nothing is synced, a crash can leave files that nobody looks for, nothing
// keeps a node that was cut off from writing, and a snapshot is a copy that takes its time while the volume is written.
//
// This file: the flags, the server, the identity service, and what controller and node share.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	driverName   = "reference.csi-quobyte.test"
	commandLimit = 60 * time.Second
	copyLimit    = 15 * time.Minute // outlives the call: its next attempt waits for this copy instead of starting anew
)

type driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer

	dataDir string
	nodeID  string
	locks   sync.Map // of *sync.Mutex, by the key of a call
}

// record is what is known of a volume or snapshot; it lies beside the image file.
type record struct {
	Size    int64
	Source  string    // the volume or snapshot it was copied from, if any
	Node    string    // where it is attached
	Created time.Time // of a snapshot
}

var validID = regexp.MustCompile(`^(vol|snap)-[0-9a-f]{32}$`)

func main() {
	endpoint := flag.String("endpoint", "unix:///csi/csi.sock", "`socket` of the CSI services")
	controller := flag.Bool("controller", false, "serve the controller")
	nodeID := flag.String("node-id", "", "serve the node of this `name`")
	// The kubelet must see the endpoint at the path that is given here.
	registerDir := flag.String("register-dir", "", "`directory` in which the kubelet looks for plugins (default: none)")
	dataDir := flag.String("data-dir", "/data", "`directory` of the images, the same on all nodes")
	flag.Parse()
	if flag.NArg() != 0 || (!*controller && *nodeID == "") || (*registerDir != "" && *nodeID == "") {
		log.Fatal("wanted: --controller or --node-id or both, --register-dir only with --node-id, and no arguments")
	}

	d := &driver{dataDir: *dataDir, nodeID: *nodeID}
	server := grpc.NewServer(grpc.UnaryInterceptor(d.answer))
	csi.RegisterIdentityServer(server, d)
	if *controller {
		csi.RegisterControllerServer(server, d)
	}
	if *nodeID != "" {
		csi.RegisterNodeServer(server, d)
		// By this file the controller knows the node.
		if err := os.WriteFile(d.nodeFile(*nodeID), nil, 0o600); err != nil {
			log.Fatal(err)
		}
	}
	socket := strings.TrimPrefix(*endpoint, "unix://")
	servers := []*grpc.Server{server}
	go serve(server, listen(socket))
	if *registerDir != "" {
		registrar := newRegistrar(socket)
		servers = append(servers, registrar)
		go serve(registrar, listen(filepath.Join(*registerDir, driverName+"-reg.sock")))
	}

	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	<-stop.Done()
	for i := len(servers) - 1; i >= 0; i-- {
		servers[i].GracefulStop() // removes the socket too
	}
}

func listen(socket string) net.Listener {
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		log.Fatal(err)
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Fatal(err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("serving on %s", socket)
	return listener
}

func serve(server *grpc.Server, listener net.Listener) {
	if err := server.Serve(listener); err != nil {
		log.Fatal(err)
	}
}

// answer handles a call, while other calls for the same volume or snapshot wait. An error without a code is Internal.
func (d *driver) answer(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	key, hasKey := keyOf(request)
	if !hasKey {
		return handler(ctx, request)
	}
	if key == "" {
		return nil, status.Error(codes.InvalidArgument, "the name or ID is missing")
	}
	start := time.Now()
	value, _ := d.locks.LoadOrStore(key, &sync.Mutex{})
	mutex := value.(*sync.Mutex)
	mutex.Lock()
	defer mutex.Unlock()
	response, err := handler(ctx, request)
	if status.Code(err) == codes.Unknown {
		err = status.Error(codes.Internal, err.Error())
	}
	log.Printf("%s %v: %v, error: %v", filepath.Base(info.FullMethod), request, time.Since(start).Round(time.Millisecond), err)
	return response, err
}

// keyOf returns the name or ID of what a call is about, if calls of this kind are about something.
func keyOf(request any) (string, bool) {
	switch request := request.(type) {
	case interface{ GetName() string }: // what is to be made
		return request.GetName(), true
	case interface{ GetVolumeId() string }:
		return request.GetVolumeId(), true
	case interface{ GetSnapshotId() string }:
		return request.GetSnapshotId(), true
	}
	return "", false
}

// run runs a command and returns what it said.
func run(limit time.Duration, argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	command := exec.CommandContext(ctx, argv[0], argv[1:]...)
	command.WaitDelay = time.Second
	output, err := command.CombinedOutput()
	said := strings.TrimSpace(string(output))
	if err != nil {
		return said, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, said)
	}
	return said, nil
}

func (d *driver) image(id string) string      { return filepath.Join(d.dataDir, id+".img") }
func (d *driver) recordFile(id string) string { return filepath.Join(d.dataDir, id+".json") }
func (d *driver) nodeFile(id string) string   { return filepath.Join(d.dataDir, "node-"+id) }

// load reads a record; it is NotFound if there is none.
func (d *driver) load(id string) (*record, error) {
	if !validID.MatchString(id) {
		return nil, status.Errorf(codes.NotFound, "%q is not an ID of this driver", id)
	}
	content, err := os.ReadFile(d.recordFile(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, status.Errorf(codes.NotFound, "there is no %s", id)
	}
	found := &record{}
	if err == nil {
		err = json.Unmarshal(content, found)
	}
	return found, err
}

func (d *driver) save(id string, r *record) error {
	content, err := json.Marshal(r)
	if err != nil {
		return err
	}
	temporary := d.recordFile(id) + ".tmp"
	if err := os.WriteFile(temporary, content, 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, d.recordFile(id))
}

// required refuses a request in which this field is empty.
func required(field string) error {
	if field == "" {
		return status.Error(codes.InvalidArgument, "a required field is empty")
	}
	return nil
}

// checkCapabilities allows file systems for one node at a time.
func checkCapabilities(capabilities ...*csi.VolumeCapability) error {
	if len(capabilities) == 0 {
		return status.Error(codes.InvalidArgument, "no capability is given")
	}
	for _, capability := range capabilities {
		if fsType := capability.GetMount().GetFsType(); capability.GetMount() == nil || (fsType != "" && fsType != "xfs") {
			return status.Error(codes.InvalidArgument, "only volumes with xfs are supported")
		}
		switch mode := capability.GetAccessMode().GetMode(); mode {
		case csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:
		default:
			return status.Errorf(codes.InvalidArgument, "access mode %v is not supported", mode)
		}
	}
	return nil
}

func (d *driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: driverName, VendorVersion: "0.0.0"}, nil
}

func (d *driver) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{
		{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{
			Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}}},
		{Type: &csi.PluginCapability_VolumeExpansion_{VolumeExpansion: &csi.PluginCapability_VolumeExpansion{
			Type: csi.PluginCapability_VolumeExpansion_ONLINE}}},
	}}, nil
}

func (d *driver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}
