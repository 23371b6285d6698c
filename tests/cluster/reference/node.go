// The node service of the reference driver: loop device, xfs, mounts, by the usual commands. No product: it has no
// crash safety, see main.go.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func (d *driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: d.nodeID}, nil
}

func (d *driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	answer := &csi.NodeGetCapabilitiesResponse{}
	for _, capability := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	} {
		answer.Capabilities = append(answer.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: capability}}})
	}
	return answer, nil
}

func (d *driver) NodeStageVolume(_ context.Context, request *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	id, staging := request.VolumeId, request.StagingTargetPath
	if err := cmp.Or(required(staging), checkCapabilities(request.VolumeCapability)); err != nil {
		return nil, err
	}
	volume, err := d.load(id)
	if err != nil {
		return nil, err
	}
	if volume.Node != d.nodeID {
		return nil, status.Errorf(codes.FailedPrecondition, "%s is attached to %q", id, volume.Node)
	}
	answer := &csi.NodeStageVolumeResponse{}
	if isMounted(staging) {
		return answer, nil
	}
	device, err := d.attachLoop(id)
	if err != nil {
		return nil, err
	}
	if err := format(device); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(staging, 0o750); err != nil {
		return nil, err
	}
	// A copy has the UUID of its source.
	options := append([]string{"nouuid"}, request.VolumeCapability.GetMount().GetMountFlags()...)
	if _, err := run(commandLimit, "mount", "-t", "xfs", "-o", strings.Join(options, ","), device, staging); err != nil {
		return nil, err
	}
	if volume.Source != "" { // which may have been smaller
		_, err = run(commandLimit, "xfs_growfs", "-d", staging)
	}
	return answer, err
}

func (d *driver) NodeUnstageVolume(_ context.Context, request *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	id, staging := request.VolumeId, request.StagingTargetPath
	if err := required(staging); err != nil {
		return nil, err
	}
	if err := unmount(staging); err != nil {
		return nil, err
	}
	if device := findLoop(id); device != "" {
		if _, err := run(commandLimit, "losetup", "--detach", device); err != nil {
			return nil, err
		}
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

func (d *driver) NodePublishVolume(_ context.Context, request *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	id, staging, target := request.VolumeId, request.StagingTargetPath, request.TargetPath
	if err := cmp.Or(required(target), checkCapabilities(request.VolumeCapability)); err != nil {
		return nil, err
	}
	if _, err := d.load(id); err != nil {
		return nil, err
	}
	if !isMounted(staging) {
		return nil, status.Errorf(codes.FailedPrecondition, "%s is not staged at %q", id, staging)
	}
	answer := &csi.NodePublishVolumeResponse{}
	if isMounted(target) {
		return answer, nil
	}
	if err := os.MkdirAll(target, 0o750); err != nil {
		return nil, err
	}
	options := "bind"
	if request.Readonly {
		options = "bind,ro"
	}
	_, err := run(commandLimit, "mount", "-o", options, staging, target)
	return answer, err
}

func (d *driver) NodeUnpublishVolume(_ context.Context, request *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := required(request.TargetPath); err != nil {
		return nil, err
	}
	if err := unmount(request.TargetPath); err != nil {
		return nil, err
	}
	if err := os.Remove(request.TargetPath); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

func (d *driver) NodeExpandVolume(_ context.Context, request *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	id, path := request.VolumeId, request.VolumePath
	if err := required(path); err != nil {
		return nil, err
	}
	volume, err := d.load(id)
	if err != nil {
		return nil, err
	}
	device := findLoop(id)
	if device == "" || !isMounted(path) {
		return nil, status.Errorf(codes.NotFound, "%s is not at %s", id, path)
	}
	if _, err := run(commandLimit, "losetup", "--set-capacity", device); err != nil {
		return nil, err
	}
	if _, err := run(commandLimit, "xfs_growfs", "-d", path); err != nil {
		return nil, err
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: volume.Size}, nil
}

func (d *driver) NodeGetVolumeStats(_ context.Context, request *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if err := required(request.VolumePath); err != nil {
		return nil, err
	}
	if _, err := d.load(request.VolumeId); err != nil {
		return nil, err
	}
	if !isMounted(request.VolumePath) {
		return nil, status.Errorf(codes.NotFound, "nothing is mounted at %s", request.VolumePath)
	}
	var found syscall.Statfs_t
	if err := syscall.Statfs(request.VolumePath, &found); err != nil {
		return nil, err
	}
	bytes := func(blocks uint64) int64 { return int64(blocks) * found.Bsize }
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: bytes(found.Blocks), Available: bytes(found.Bavail), Used: bytes(found.Blocks - found.Bfree)},
		{Unit: csi.VolumeUsage_INODES, Total: int64(found.Files), Available: int64(found.Ffree), Used: int64(found.Files - found.Ffree)},
	}}, nil
}

// attachLoop returns the loop device of an image file, which it attaches if there is none: with direct I/O where the
// file's file system can do it.
func (d *driver) attachLoop(id string) (string, error) {
	if device := findLoop(id); device != "" {
		return device, nil
	}
	device, err := run(commandLimit, "losetup", "--find", "--show", d.image(id))
	if err != nil {
		return "", err
	}
	if _, err := run(commandLimit, "losetup", "--direct-io=on", device); err != nil {
		log.Print(err)
	}
	return device, nil
}

// findLoop finds the loop device of an image file by the file's name: paths differ between the nodes' mount namespaces.
func findLoop(id string) string {
	attributes, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, attribute := range attributes {
		content, err := os.ReadFile(attribute)
		if err == nil && filepath.Base(strings.TrimSpace(string(content))) == id+".img" {
			return "/dev/" + strings.Split(attribute, "/")[3]
		}
	}
	return ""
}

// format makes an xfs on a device on which blkid finds nothing.
func format(device string) error {
	found, err := run(commandLimit, "blkid", "--probe", "--output", "value", "--match-tag", "TYPE", device)
	var failed *exec.ExitError
	switch {
	case err == nil && found == "xfs":
		return nil
	case err == nil:
		return fmt.Errorf("%s: holds %q, not xfs", device, found)
	case errors.As(err, &failed) && failed.ExitCode() == 2:
		_, err = run(commandLimit, "mkfs.xfs", "-q", "-K", device)
	}
	return err
}

func unmount(path string) error {
	for isMounted(path) {
		if _, err := run(commandLimit, "umount", path); err != nil {
			return err
		}
	}
	return nil
}

// isMounted says whether something is mounted at a path; it does not touch what is mounted.
func isMounted(path string) bool {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	return slices.ContainsFunc(strings.Split(string(table), "\n"), func(line string) bool {
		fields := strings.Fields(line)
		return len(fields) > 4 && fields[4] == filepath.Clean(path)
	})
}
