// The controller service of the reference driver: image files and their records are made, copied, enlarged and removed.
// No product: it has no crash safety, see main.go.
package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	minimumSize = 300 << 20 // mkfs.xfs refuses less
	defaultSize = 1 << 30
	maximumSize = 15 << 40 // ext4 below holds no larger file
	blockSize   = 4096
)

func (d *driver) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	answer := &csi.ControllerGetCapabilitiesResponse{}
	for _, capability := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
	} {
		answer.Capabilities = append(answer.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: capability}}})
	}
	return answer, nil
}

func (d *driver) CreateVolume(_ context.Context, request *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if err := checkCapabilities(request.VolumeCapabilities...); err != nil {
		return nil, err
	}
	id := idOf("vol", request.Name)
	content := request.GetVolumeContentSource()
	source := cmp.Or(content.GetSnapshot().GetSnapshotId(), content.GetVolume().GetVolumeId())
	wanted := request.GetCapacityRange()

	volume, err := d.load(id)
	if status.Code(err) == codes.NotFound {
		volume, err = d.makeVolume(id, source, wanted)
	}
	if err != nil {
		return nil, err
	}
	tooLarge := wanted.GetLimitBytes() > 0 && volume.Size > wanted.GetLimitBytes()
	if volume.Source != source || volume.Size < wanted.GetRequiredBytes() || tooLarge {
		return nil, status.Errorf(codes.AlreadyExists, "%s is there with another size or source", id)
	}
	return &csi.CreateVolumeResponse{
		Volume: &csi.Volume{VolumeId: id, CapacityBytes: volume.Size, ContentSource: content}}, nil
}

func (d *driver) makeVolume(id, source string, wanted *csi.CapacityRange) (*record, error) {
	from := &record{}
	if source != "" {
		var err error
		if from, err = d.load(source); err != nil {
			return nil, err
		}
	}
	size, err := sizeOf(wanted, from.Size)
	if err != nil {
		return nil, err
	}
	volume := &record{Size: size, Source: source}
	return volume, d.make(id, volume)
}

// make makes an image file, blank or as a copy, and its record.
func (d *driver) make(id string, r *record) error {
	if r.Source != "" {
		if _, err := run(copyLimit, "cp", "--reflink=auto", "--sparse=always", d.image(r.Source), d.image(id)); err != nil {
			return err
		}
	} else if err := os.WriteFile(d.image(id), nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(d.image(id), r.Size); err != nil {
		return err
	}
	return d.save(id, r)
}

func (d *driver) DeleteVolume(_ context.Context, request *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	return &csi.DeleteVolumeResponse{}, d.remove(request.VolumeId)
}

// remove removes a volume or snapshot; it is no error if there is none.
func (d *driver) remove(id string) error {
	found, err := d.load(id)
	switch {
	case status.Code(err) == codes.NotFound:
		return nil
	case err != nil:
		return err
	case found.Node != "":
		return status.Errorf(codes.FailedPrecondition, "%s is attached to %s", id, found.Node)
	}
	if err := os.Remove(d.image(id)); err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.Remove(d.recordFile(id))
}

func (d *driver) ControllerPublishVolume(_ context.Context, request *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	if err := cmp.Or(required(request.NodeId), checkCapabilities(request.VolumeCapability)); err != nil {
		return nil, err
	}
	volume, err := d.load(request.VolumeId)
	if err != nil {
		return nil, err
	}
	_, err = os.Stat(d.nodeFile(request.NodeId))
	switch {
	case filepath.Base(request.NodeId) != request.NodeId || os.IsNotExist(err):
		return nil, status.Errorf(codes.NotFound, "there is no node %q", request.NodeId)
	case err != nil:
		return nil, err
	case volume.Node == request.NodeId:
		return &csi.ControllerPublishVolumeResponse{}, nil
	case volume.Node != "":
		return nil, status.Errorf(codes.FailedPrecondition, "%s is attached to %s", request.VolumeId, volume.Node)
	}
	volume.Node = request.NodeId
	return &csi.ControllerPublishVolumeResponse{}, d.save(request.VolumeId, volume)
}

func (d *driver) ControllerUnpublishVolume(_ context.Context, request *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	answer := &csi.ControllerUnpublishVolumeResponse{}
	volume, err := d.load(request.VolumeId)
	if status.Code(err) == codes.NotFound {
		return answer, nil
	}
	if err != nil || volume.Node == "" || (request.NodeId != "" && request.NodeId != volume.Node) {
		return answer, err
	}
	volume.Node = ""
	return answer, d.save(request.VolumeId, volume)
}

func (d *driver) ValidateVolumeCapabilities(_ context.Context, request *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if len(request.VolumeCapabilities) == 0 {
		return nil, required("")
	}
	if _, err := d.load(request.VolumeId); err != nil {
		return nil, err
	}
	if err := checkCapabilities(request.VolumeCapabilities...); err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeCapabilities: request.VolumeCapabilities}}, nil
}

func (d *driver) ControllerExpandVolume(_ context.Context, request *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if request.CapacityRange == nil {
		return nil, status.Error(codes.InvalidArgument, "no size is given")
	}
	volume, err := d.load(request.VolumeId)
	if err != nil {
		return nil, err
	}
	// A volume that is large enough already is no error.
	wanted := max(request.CapacityRange.RequiredBytes, volume.Size)
	size, err := sizeOf(&csi.CapacityRange{RequiredBytes: wanted, LimitBytes: request.CapacityRange.LimitBytes}, 0)
	if err != nil {
		return nil, err
	}
	if size > volume.Size {
		if err := os.Truncate(d.image(request.VolumeId), size); err != nil {
			return nil, err
		}
		volume.Size = size
		if err := d.save(request.VolumeId, volume); err != nil {
			return nil, err
		}
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: volume.Size, NodeExpansionRequired: true}, nil
}

func (d *driver) CreateSnapshot(_ context.Context, request *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if err := required(request.SourceVolumeId); err != nil {
		return nil, err
	}
	id := idOf("snap", request.Name)
	snapshot, err := d.load(id)
	if status.Code(err) == codes.NotFound {
		snapshot, err = d.makeSnapshot(id, request.SourceVolumeId)
	}
	if err != nil {
		return nil, err
	}
	if snapshot.Source != request.SourceVolumeId {
		return nil, status.Errorf(codes.AlreadyExists, "%s is there, of another volume", id)
	}
	return &csi.CreateSnapshotResponse{Snapshot: &csi.Snapshot{SnapshotId: id, SourceVolumeId: snapshot.Source,
		SizeBytes: snapshot.Size, CreationTime: timestamppb.New(snapshot.Created), ReadyToUse: true}}, nil
}

func (d *driver) makeSnapshot(id, source string) (*record, error) {
	volume, err := d.load(source)
	if err != nil {
		return nil, err
	}
	snapshot := &record{Size: volume.Size, Source: source, Created: time.Now()}
	return snapshot, d.make(id, snapshot)
}

func (d *driver) DeleteSnapshot(_ context.Context, request *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	return &csi.DeleteSnapshotResponse{}, d.remove(request.SnapshotId)
}

// idOf makes the ID from the name, so that a repeated call finds what an earlier one made.
func idOf(kind, name string) string {
	sum := sha256.Sum256([]byte(name))
	return kind + "-" + hex.EncodeToString(sum[:16])
}

// sizeOf chooses the size of a volume, whose source, if it has one, has sourceSize.
func sizeOf(wanted *csi.CapacityRange, sourceSize int64) (int64, error) {
	size := cmp.Or(wanted.GetRequiredBytes(), sourceSize, defaultSize)
	if size < sourceSize || size > maximumSize {
		return 0, status.Errorf(codes.OutOfRange, "%d bytes: less than the source's %d or too many", size, sourceSize)
	}
	size = (max(size, minimumSize) + blockSize - 1) / blockSize * blockSize
	if limit := wanted.GetLimitBytes(); limit > 0 && size > limit {
		return 0, status.Errorf(codes.OutOfRange, "at most %d bytes wanted, at least %d needed", limit, size)
	}
	return size, nil
}
