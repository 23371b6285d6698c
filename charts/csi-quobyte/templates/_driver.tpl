{{/* What the driver's containers of the controller and of the nodes have in common. */}}

{{/* Where a pool is in the pods: (dict "pool" $pool) */}}
{{- define "csi-quobyte.poolPath" -}}
/pools/{{ .pool.name }}{{ with .pool.subPath }}/{{ . }}{{ end }}
{{- end }}

{{- define "csi-quobyte.commonArgs" -}}
{{- range .Values.pools }}
- --pool={{ .name }}={{ include "csi-quobyte.poolPath" (dict "pool" .) }}
{{- end }}
- --driver-name={{ .Values.driverName }}
- --require-mount={{ .Values.requireMount }}
- --pool-timeout={{ .Values.poolTimeout }}
- --health-address=:{{ .Values.healthPort }}
{{- if .Values.metrics.enabled }}
- --metrics-address=:{{ .Values.metrics.port }}
{{- end }}
- --log-level={{ .Values.logLevel }}
- --log-format={{ .Values.logFormat }}
{{- end }}

{{/* For operators: `kubectl exec ... -- csi-quobyte check` then needs no flags. */}}
{{- define "csi-quobyte.commonEnv" -}}
{{- $pools := list }}
{{- range .Values.pools }}
{{- $pools = append $pools (printf "%s=%s" .name (include "csi-quobyte.poolPath" (dict "pool" .))) }}
{{- end -}}
- name: CSI_QUOBYTE_POOLS
  value: {{ join " " $pools | quote }}
- name: CSI_QUOBYTE_REQUIRE_MOUNT
  value: {{ .Values.requireMount | quote }}
{{- end }}

{{- define "csi-quobyte.ports" -}}
- name: health
  containerPort: {{ .Values.healthPort }}
{{- if .Values.metrics.enabled }}
- name: metrics
  containerPort: {{ .Values.metrics.port }}
{{- end }}
{{- end }}

{{/*
/livez says that the process answers, never how a pool is: a hung pool must not restart a pod. The start has a limit of
its own, because a node process first looks at every device that it finds, before it serves anything.
*/}}
{{- define "csi-quobyte.probes" -}}
startupProbe:
  httpGet: {path: /livez, port: health}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 120
livenessProbe:
  httpGet: {path: /livez, port: health}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 12
readinessProbe:
  httpGet: {path: /readyz, port: health}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}

{{/* HostToContainer: a Quobyte volume that is mounted on the host later is seen by the pod. */}}
{{- define "csi-quobyte.poolMounts" -}}
{{- range $index, $pool := .Values.pools }}
- name: pool-{{ $index }}
  mountPath: /pools/{{ $pool.name }}
  mountPropagation: HostToContainer
{{- end }}
{{- end }}

{{- define "csi-quobyte.poolVolumes" -}}
{{- range $index, $pool := .Values.pools }}
- name: pool-{{ $index }}
  hostPath:
    path: {{ $pool.hostPath | quote }}
    type: Directory
{{- end }}
{{- end }}

{{/* The part of a pod's specification that says where it runs: the values of controller or node. */}}
{{- define "csi-quobyte.placement" -}}
terminationGracePeriodSeconds: {{ .terminationGracePeriodSeconds }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
