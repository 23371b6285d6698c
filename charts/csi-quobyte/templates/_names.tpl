{{/* Names, labels and images. Labels of selectors never change: Kubernetes refuses that. */}}

{{- define "csi-quobyte.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* At most 40 characters, so that the longest suffix (-snapshotter) and what Kubernetes appends still fit. */}}
{{- define "csi-quobyte.fullname" -}}
{{- $name := include "csi-quobyte.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Labels of an object: (dict "root" $ "component" "controller") */}}
{{- define "csi-quobyte.labels" -}}
{{ include "csi-quobyte.podLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels of a pod: nothing that another version of the chart alone would change, so that it restarts no pod. */}}
{{- define "csi-quobyte.podLabels" -}}
{{- with .root.Values.commonLabels }}
{{- toYaml . }}
{{ end }}
{{- include "csi-quobyte.selectorLabels" . }}
app.kubernetes.io/part-of: csi-quobyte
{{- end }}

{{- define "csi-quobyte.selectorLabels" -}}
app.kubernetes.io/name: {{ include "csi-quobyte.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "csi-quobyte.image" -}}
{{- $advice := "image.repository: no image is published yet; build one (make image), push it to a registry of yours and name it here" -}}
{{- required $advice .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}
